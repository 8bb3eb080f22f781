"""The files of the page `/ui`: HTML, a style sheet, ES modules and an icon, without a build step or other sources."""
