"""Generated flights over a generated or a real climate, written as files of real ones."""
