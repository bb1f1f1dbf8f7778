"""What is known of the models that can have a pyramid: one record per text model, vision tower and family. No torch."""
