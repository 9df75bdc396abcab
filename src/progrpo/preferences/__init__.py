"""People's preferences: pairs of pictures, votes, and the reward models that are learnt from them."""
