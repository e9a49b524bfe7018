"""The pages that the gateway serves to browsers, and the events that the map follows."""
