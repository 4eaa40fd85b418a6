"""From costs, devices and links to a plan."""
