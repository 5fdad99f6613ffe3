"""Files as they are read and written: by position, past the page cache, staged and renamed into place."""
