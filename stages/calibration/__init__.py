"""Cut calibration windows out of documents."""
