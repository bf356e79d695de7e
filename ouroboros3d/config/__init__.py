"""Every dimension and every switch: dataclasses (schema), YAML and overrides (loading), bounds (checks)."""
