"""`make bench`: what Miaotui costs and gains against named peers, in one run on one machine."""
