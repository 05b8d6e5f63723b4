"""What the caches of streaming video are made of; the policies themselves are in vidattn.cache."""
