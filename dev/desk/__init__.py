"""The desk: what trial, sweep, report and watch share. Leaf modules; nothing outside dev/ imports them."""
