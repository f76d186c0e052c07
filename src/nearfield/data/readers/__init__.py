"""One file a kind of reader. A reader turns files into rows and says which rows it could not read."""
