"""Questions about clips that only pictures, sound and text together can answer."""
