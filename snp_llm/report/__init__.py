"""What a finished run says of itself: prune_report.json, the model card, the page in pictures."""
