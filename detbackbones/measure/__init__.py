"""What a model is, measured by running it on the meta device: levels, layers, image sizes."""
