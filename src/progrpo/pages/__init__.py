"""Pages for people: HTML files and small servers that show runs. `report` shows one run.

A folder may come from a stranger: texts are escaped, numbers are checked, and only pictures inside the folder are read.
"""
