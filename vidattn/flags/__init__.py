"""The flags of the commands, one file each: declared and read without PyTorch."""
