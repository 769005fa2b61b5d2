"""What ranks a catalogue: baselines, trained models, with and without a chain."""
