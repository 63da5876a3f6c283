"""From a few names to one CLIP-type model, whatever its towers are made of."""
