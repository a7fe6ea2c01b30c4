"""From documents to calibration windows."""
