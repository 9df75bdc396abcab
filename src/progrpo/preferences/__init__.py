"""What people prefer: pairs of pictures, votes, and what is learned from them."""
