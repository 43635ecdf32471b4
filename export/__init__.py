"""From a BLIP checkpoint to a bundle, in torch; the only place that knows both sides."""
