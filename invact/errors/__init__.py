"""Bad input gets one clear error, and a fault of ours is never told as the user's."""
