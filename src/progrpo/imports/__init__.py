"""Settings of other frameworks as a configuration of ours, with an account of every one of them."""
