"""Maps and measures of embedding spaces that need no training."""
