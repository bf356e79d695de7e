"""From a photo to the files of its object."""
