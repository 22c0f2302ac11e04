"""The neuron browser: a local web application that shows run directories, also as a folder of static pages."""
