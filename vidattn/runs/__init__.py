"""What the commands and the training programs share: models, requests, clips and files."""
