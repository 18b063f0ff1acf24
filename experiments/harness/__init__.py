"""What the experiments share: from a config and a list of arms to records, a table and a picture."""
