"""What the experiments share: from a config and its arms to records, a table and a picture."""
