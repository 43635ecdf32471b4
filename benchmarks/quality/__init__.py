"""What captions are worth: metrics, detokenising, consensus, rewards."""
