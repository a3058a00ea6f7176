"""What is learned of a model once, in minutes: gates that tell which tokens matter, and how many each head keeps."""

from .calibrate import Calibration, calibrate

__all__ = ["Calibration", "calibrate"]
