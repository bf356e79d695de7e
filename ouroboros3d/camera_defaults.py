"""The release's cameras: of its training pictures, and of its turntable video."""

FOV, DISTANCE = 39.598, 1.7417  # degrees; of the camera from the object's centre, whose bounding sphere has radius 0.5
TURNTABLE_FOV, TURNTABLE_DISTANCE = 49.1, 1.5
