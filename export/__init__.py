"""From a BLIP checkpoint to a bundle, in torch and optimum; the only place that knows both sides."""
