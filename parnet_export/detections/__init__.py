"""The forms that detections take, and how they are compared."""
