"""One file per family of hypernetworks, on the papers' core, with the control that others leave out."""
