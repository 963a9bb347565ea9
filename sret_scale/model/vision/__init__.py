"""The vision model on the recursion core: stem, SReT, presets, published weights."""
