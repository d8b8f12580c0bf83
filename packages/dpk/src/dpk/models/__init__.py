"""The networks of the CIFAR-100 protocol, for pictures of 32 x 32 pixels. A stage's last module is its activation."""
