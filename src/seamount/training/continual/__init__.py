"""Learning one task after the other without losing the earlier ones: replay, EWC, drift, versions."""
