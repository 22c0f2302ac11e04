"""The neuron browser: a local web application over run directories, and the same pages as a folder."""
