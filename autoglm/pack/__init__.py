"""What goes into a model file and how it is written; knows neither torch nor training."""
