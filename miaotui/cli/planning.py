"""`miaotui plan`: how a model is split, for a person to see."""
