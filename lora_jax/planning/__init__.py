"""What a compiled step costs on a device that need not be there: chips, bytes, exchanges."""
