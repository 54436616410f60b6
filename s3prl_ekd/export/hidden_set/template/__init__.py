"""Files copied into every hidden-set package; they import nothing from s3prl_ekd."""
