"""Measures of videos by trained networks, whose weights scripts/fetch_metric_weights.py fetches."""
