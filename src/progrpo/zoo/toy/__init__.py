"""A toy world for studies: a conditional flow over a few dims with rewards in closed form."""
