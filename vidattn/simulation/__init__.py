"""What a plan costs on hardware that is not here."""
