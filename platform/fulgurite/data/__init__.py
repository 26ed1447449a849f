"""Reading data of users: image files, archives, text, and the cache of what was read."""
