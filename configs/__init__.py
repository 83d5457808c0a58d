"""Named presets, one YAML file each."""
