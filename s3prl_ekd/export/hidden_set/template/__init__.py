"""The files of a hidden-set package, as they are: they run alone and import nothing of ours."""
