"""What methods are made of: their options, what they are told, and patterns, scores and choices."""
