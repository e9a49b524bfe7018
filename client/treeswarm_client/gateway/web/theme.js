// Light or dark, before anything is drawn: the system's choice, or the viewer's own.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const paint = () => {
    root.dataset.theme = localStorage.getItem("treeswarm-theme") ?? (dark.matches ? "dark" : "light");
  };
  dark.addEventListener("change", paint);
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      localStorage.setItem("treeswarm-theme", root.dataset.theme === "dark" ? "light" : "dark");
      paint();
    });
  });
  paint();
})();
