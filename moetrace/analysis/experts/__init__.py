"""What experts read, compute and weigh, and which inputs reach them."""
