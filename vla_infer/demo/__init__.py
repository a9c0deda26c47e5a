"""The demonstration: a rendered scene, a bag of it, the bag's player and the live view."""
